"""The report reads records alone and imports `lib.utils` only.

claims.yaml  every claim: statement, number, rule, expectation, source
claims       validates the claims, measures them in the records and decides them by their rules
figures      the figures and tables of each experiment
"""
