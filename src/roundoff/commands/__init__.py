"""The commands of `roundoff`, one module a subject; each imports what it needs when it runs."""
