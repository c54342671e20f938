"""Attacks: `lib.attacks.api.attack(name, model, x, y, eps)` runs any of them; one file per attack.

Images are n c h w in [0, 1], `eps` is a radius in pixel units, models return logits.

| attack | type | norm | paper |
|---|---|---|---|
| fgsm | gradient, one step | Linf | Goodfellow et al. 2015, arXiv:1412.6572 |
| pgd | gradient | Linf, L2 | Madry et al. 2018, arXiv:1706.06083; momentum: Dong et al. 2018, arXiv:1710.06081 |
| eotpgd | gradient, random models | Linf, L2 | Athalye et al. 2018b, arXiv:1707.07397 |
| apgd-ce, apgd-dlr, apgd-t | gradient, no step size | Linf, L2 | Croce and Hein 2020a, arXiv:2003.01690 |
| fab-t | gradient, minimal distance | Linf, L2 | Croce and Hein 2020b, arXiv:1907.02044 |
| square | black box, scores | Linf, L2 | Andriushchenko et al. 2020, arXiv:1912.00049 |
| autoattack | ensemble: apgd-ce, apgd-t, fab-t, square | Linf, L2 | Croce and Hein 2020a |
| autoattack-rand | ensemble for random models: apgd-ce, apgd-dlr | Linf, L2 | Croce and Hein 2020a |
| cw | gradient, minimal distance | L2 | Carlini and Wagner 2017, arXiv:1608.04644 |
| deepfool | gradient, minimal distance | L2 | Moosavi-Dezfooli et al. 2016, arXiv:1511.04599 |
| jsma-f, jsma-z | gradient, few values | L0 | Papernot et al. 2016, arXiv:1511.07528 |
| transfer | black box, by a surrogate | Linf, L2 | Papernot et al. 2017, arXiv:1602.02697 |
| noise | black box, labels: the control without gradients | Linf, L2 | - |

- `lib.attacks.api`: `attack`, the registry of attacks and the checks of a call.
- `lib.attacks.common`: losses, balls, random starts, the step size and the gradient, shared by all attacks.
- `lib.attacks.checks`: checks of labels, logits and results.
- `lib.attacks.pgd`: `fgsm` and `pgd`.
- `lib.attacks.eot_pgd`: PGD on the expected loss of a random defence; not in the registry, for it returns no success.
- `lib.attacks.low_frequency`: a smooth attack outside the ball (Kassis et al. 2025; Guo et al. 2019).
- `lib.attacks.apgd`: `apgd` and `apgd_targeted`.
- `lib.attacks.autoattack`: the ensembles `autoattack` and `autoattack_rand`.
- `lib.attacks.fab`: `fab_t`, the adapter to torchattacks and the only module that imports it.
- `lib.attacks.square`: `square` and `random_noise`.
- `lib.attacks.carlini_wagner`, `lib.attacks.deepfool`, `lib.attacks.jsma`: the attacks of these names.
- `lib.attacks.transfer`: attacks on a surrogate, and how to train one on a victim's predictions.
- `lib.attacks.bpda`: a backward pass for layers without a useful gradient (Athalye et al. 2018a, arXiv:1802.00420).
"""
