"""One model split over several ranks."""
