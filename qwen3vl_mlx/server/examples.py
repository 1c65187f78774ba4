"""What the examples of /docs show: a red disc on blue, 96 x 96 pixels."""

from typing import Final

PICTURE: Final = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAGAAAABgAQMAAADYVuV7AAAABlBMVEUoUMjcKCgpCf2yAAAAsklEQVR42u3S"
    "MVbDMBAE0G/JBR3cgBzFuUmOxlF0FJcpU1C4MIjCK5P37MKENlPs02hmR/sk8cTjeJ1ABlPflSbkWsdfV60T"
    "JHijX8klejMUdGVROhjCluAUiz5Clt2GhBdRUjj0e7aT+9h7ZRAnb5R9kmNounK0598kt5tx/lNAgbqnjPC9"
    "p9xgDjKJsrHNwpsiyBiktnddfsjAuTW+1zqvg94iJMEn15V88bH5b08cxg+JlyUIux/72AAAAABJRU5ErkJg"
    "gg=="
)
