"""The page in the browser: an application over a store, who may read it, and live updates."""
