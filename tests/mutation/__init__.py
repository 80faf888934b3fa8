"""Mutation testing: mutmut makes the mutants, pytest runs the tests that cover each, in a fork that is warm already."""
