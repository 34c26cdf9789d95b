"""`network doctor`: which checks follow from the state that managers share (`plan`), and what their results mean
(`evidence`, `rules`). Pure."""
