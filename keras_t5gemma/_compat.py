"""Functions that touch private names of libraries."""
