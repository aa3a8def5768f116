"""Launchers: how engines are started, stopped, found again and watched."""
