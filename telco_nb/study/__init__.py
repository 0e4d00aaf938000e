"""Parameters, plan and record of a study. Imports no other room."""
