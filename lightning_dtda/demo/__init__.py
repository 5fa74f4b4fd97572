"""The demo's module and data, ordinary Lightning classes that know nothing of attribution."""
