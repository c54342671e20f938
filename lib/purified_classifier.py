"""A classifier behind a purifier, whose noise is new in every call or fixed."""

import inspect
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib.utils.random_state import RandnLike, forked_noise, restored_networks, shared_randn_like, unseeded_noise
from lib.utils.seeds import derive_seed
from lib.utils.validation import Integer, NonNegativeInt, PositiveInt, check_value

DRAWS_ELSEWHERE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # purified classifiers of fixed noise


def takes_noise(purifier: Callable) -> bool:
    """Say whether a purifier takes its noise as the argument `randn_like`, see `lib.purify.PurifierProtocol`."""
    try:
        return "randn_like" in inspect.signature(getattr(purifier, "forward", purifier)).parameters
    except (TypeError, ValueError):  # a built-in function
        return False


def check_purified(y: Any, x: Tensor) -> None:
    """Raise ValueError unless a purifier's answer `y` is a tensor of the shape of the images `x`."""
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        expected = f"expected images of shape {tuple(x.shape)} from the purifier"
        raise ValueError(f"{expected}, got {got}: let the classifier resize, or wrap the purifier")


class PurifiedClassifier(nn.Module):
    """A classifier behind a purifier: logits of images in [0, 1], differentiable, random in every call.

    The noise is that of the global random state, which attacks and evaluations seed and restore; for a gradient that is
    averaged over noise give attacks their option `eot`. `random` says whether there is any, `independent_noise` whether
    images of a batch have noise of their own, and `evaluations` how many network evaluations one image takes. A
    purifier that takes no `randn_like` may share noise within a batch, unless its own attribute `independent_noise` is
    True; one without noise says so by `deterministic = True`.

    Args:
        purifier: images to images of the same shape, see `lib.purify.PurifierProtocol`; one without the argument
            `randn_like` will do.
        classifier: logits of images in [0, 1].
        votes: at least 1; more for the logarithm of the mean probabilities of so many purifications.
        fixed: a seed, an integer, that makes the noise the same for all images and calls, so that the defence is a
            function of the image. Where noise is drawn from elsewhere than `randn_like`, images pass one by one, each
            under the same random state (`lib.utils.random_state.forked_noise`).

    Raises:
        ValueError: for another number of votes or another seed. At a call: for a purifier that returns another shape,
            and with `fixed` for noise that cannot be seeded.
    """

    def __init__(self, purifier: Any, classifier: Any, votes: Any = 1, fixed: Any = None) -> None:
        super().__init__()
        for name, value in (("purifier", purifier), ("classifier", classifier)):
            if not callable(value):
                raise TypeError(f"expected a {name} that maps images, got {type(value).__name__}")
        self.purifier, self.classifier = purifier, classifier
        self.votes = check_value("votes", votes, PositiveInt)
        self.fixed = check_value("fixed", fixed, Integer | None)

    @property
    def random(self) -> bool:
        inner = getattr(self.purifier, "forward_fn", self.purifier)  # of `lib.attacks.bpda.bpda`
        return self.fixed is None and not getattr(inner, "deterministic", False)

    @property
    def independent_noise(self) -> bool:
        inner = getattr(self.purifier, "forward_fn", self.purifier)
        return self.fixed is None and bool(getattr(inner, "independent_noise", takes_noise(inner)))

    @property
    def evaluations(self) -> int:
        own = getattr(self.purifier, "evaluations", 1)
        return self.votes * max(1, check_value("the purifier's evaluations", own, NonNegativeInt))

    def forward(self, x: Tensor, noise: tuple[RandnLike, ...] | None = None) -> Float[Tensor, "n k"]:
        if self.fixed is not None and noise is None:
            return self._fixed_logits(x)
        z = []
        for _ in range(self.votes):
            y = self.purifier(x, *(noise or ()))
            check_purified(y, x)
            z.append(self.classifier(y))
        return z[0] if self.votes == 1 else torch.stack(z).log_softmax(-1).logsumexp(0) - np.log(self.votes)

    def _fixed_logits(self, x: Tensor) -> Tensor:
        """Return logits under the one noise of `fixed`; ValueError where two answers to one image differ under it."""
        fixed, shared = cast(int, self.fixed), takes_noise(self.purifier)
        seed = derive_seed(fixed, "fixed")

        def logits(images: Tensor) -> Tensor:
            return self.forward(images, (shared_randn_like(fixed),) if shared else ())

        if self not in DRAWS_ELSEWHERE and len(x):
            if unseeded_noise(logits, x[:1], seed, "keep"):
                expected = "expected noise that can be seeded, for `fixed`, got two answers to one image"
                raise ValueError(f"{expected}: let {type(self.purifier).__name__} draw by randn_like")
            with restored_networks(self), torch.no_grad():
                one, other = (self._seeded(logits, x[:1], seed + k) for k in (0, 1))
            DRAWS_ELSEWHERE[self] = not torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
        if not DRAWS_ELSEWHERE.get(self, False):
            with forked_noise(self, seed, x.device) as noise_was_drawn:
                z = logits(x)
                if not noise_was_drawn():
                    return z
        return torch.cat([self._seeded(logits, image, seed) for image in x.split(1)])

    def _seeded(self, logits: Callable, x: Tensor, seed: int) -> Tensor:
        """Return logits under one random state."""
        with forked_noise(self, seed, x.device):
            return logits(x)
