"""`resode demo`."""


def demo_command() -> None:
    """x"""
