"""The page of ``fewstep ui``: a file for each tab, one for the models, one for long work, one for what is shown."""
