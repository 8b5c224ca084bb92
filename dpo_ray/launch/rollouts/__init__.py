"""The actors that own rollout engines, judges and weight transfer."""
