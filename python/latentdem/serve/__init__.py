"""``latentdem serve``: a page on one's own machine to try deblurring and reconstruction."""
