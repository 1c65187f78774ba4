"""Many pictures, one question each: folders to results that survive any end of the run."""
