"""Key providers: one module for each KMS, imported only when it is configured."""
