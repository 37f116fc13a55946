"""What is learned: teachers, and (later) statistics, grids, coefficients and operators. Everything long resumes."""
