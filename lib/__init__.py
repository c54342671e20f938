"""Distillation for adversarial defence: the modules, in the order of the data flow.

data          data sets: images in [0, 1] with labels, fixed splits, verified files
models        classifiers: CNN, ResNet, ensembles; logits, predictions, accuracy
diffusion     diffusion models: noise schedule, network, solvers of the reverse process
training      the one training loop
attacks       attacks on classifiers, all behind `lib.attacks.api.attack`
distillation  what a student learns from its teacher, one module per method
purify        purifiers and purified classifiers; `python -m lib.purify`
evaluation    robust accuracy, a matched set of attacks, threat models, sanity checks, certificates
experiments   what each notebook computes, one module or two per notebook
report        claims, figures and conclusions in words, from the records alone
pipeline      notebooks with checked parameters, profiles, benchmark, audit, environment
utils         what all of them use: files, seeds, devices, intervals, progress

The core, data to evaluation, imports nothing of experiments, report and pipeline.
Commands: `python -m lib.run`, `lib.profile`, `lib.claims`.
"""
