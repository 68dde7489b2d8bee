"""What the trained model does with right answers before it, without a server: which pages it needs, how they change."""
