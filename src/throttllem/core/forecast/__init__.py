"""The coming iterations of one engine: projection, horizon, performance table."""
