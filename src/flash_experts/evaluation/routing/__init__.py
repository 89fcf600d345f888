"""Router analysis: which expert processed which token, specialization tests, load balance, and a report."""
