"""What the stages share: records, hooks, schema, wire format, configuration. Imports no other folder."""
