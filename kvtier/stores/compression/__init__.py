"""Fewer bytes: blocks are compressed without loss before a store seals them, and restored after it verified them."""
