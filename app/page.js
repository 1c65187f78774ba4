// The sidebar would cover a narrow screen: close it there, once it is there.
(() => {
  if (window.innerWidth >= 768) return;
  const close = () => {
    const bar = document.querySelector(".sidebar");
    if (!bar) return requestAnimationFrame(close);
    if (bar.classList.contains("open")) bar.querySelector(".toggle-button")?.click();
  };
  close();
})();

// Names for screen readers, where Gradio gives a control none.
(() => {
  const names = [
    ["#box textarea", "Your question"],
    ["#box input[type=file]", "Add pictures"],
    ["#picture input[type=file]", "Choose a picture"],
    ["#conversation .image-container > button", "Show the picture"],
  ];
  const name = () => {
    for (const [selector, text] of names)
      for (const element of document.querySelectorAll(`${selector}:not([aria-label])`))
        element.setAttribute("aria-label", text);
  };
  new MutationObserver(name).observe(document.documentElement, { childList: true, subtree: true });
})();
