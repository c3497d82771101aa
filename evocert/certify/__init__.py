"""Certificates: the cascade from cheap bounds to exact verification, and second opinions."""
