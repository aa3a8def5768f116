"""SLO attainment while engines, clients and GPUs change under a policy: docs/evaluation/guarantee.md."""
