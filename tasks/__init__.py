"""SeqIO tasks and mixtures, one module per family.

Importing a module, or calling what a gin file calls, declares tasks; SeqIO has them once it is imported (see
`data.libraries`), so that mistakes elsewhere are answered without that wait.
"""
