"""For operators: what is measured, a Grafana dashboard, alert rules."""
