"""The page with sliders: edits, paths between images, samples and a look inside, in a browser on this machine."""
