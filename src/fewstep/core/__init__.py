r"""The numbers of sampling: noise laws, time grids, prediction types, tableaux and model statistics."""
