"""What is to be done and what was done: parameters, plan, record. Imports no other room."""
