"""The report reads records alone and imports `lib.utils` only.

claims.yaml     every claim: statement, operands, rule, margin, publication
answers         a measure of a defence per image
claim_schema    checks the claims
claim_values    measures them in the records, a value per seed or per image
statistics      estimates with intervals over seeds and images, equivalence, Holm's adjustment
claim_verdicts  decides them by their rules
protocol.yaml   what was frozen before the confirming run, in which commit, for which seeds
preregistration says which records confirm; claims about others are exploratory
claim_results   all claims of a profile, with Holm's adjustment over the primary ones
claim_tables    shows them as Markdown
claims          the command `python -m lib.claims`: prints and checks results, writes README's computed parts
figures         the figures and tables of each experiment
pieces_report   the command `python -m lib.report.pieces_report`: a page on pieces of GPU minutes, of these parts:
piece_files     the finished pieces, as read from disk
piece_claims    experiment 5's claims, decided on them
piece_tables    their tables; those of kd and dd in piece_distillation
"""
