"""What all other modules may use.

files          the repository's root, atomic writes, canonical JSON
artifacts      saves and loads records, metrics and weights
device         GPU or CPU
seeds          independent random streams of one seed
random_state   random states and train/eval flags for one block
per_image_rng  noise that belongs to one image
intervals      Wilson, Clopper-Pearson and Student's t
parallel       tasks in parallel processes
progress       progress bars
checkpoints    files from which interrupted work goes on
training_state what a training saves in them
content_hash   hash of what decides how an object behaves
code_hash      hash of the code that decides a result
"""
