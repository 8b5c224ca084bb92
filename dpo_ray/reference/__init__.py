"""The reference policy as data: its log-probabilities, computed once and shared through a cache."""
