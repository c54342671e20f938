"""Attacks: one file each, all behind `lib.attacks.api.attack`."""
