"""What the tests share: the lab of namespaced hosts, the leak check, and finding what a test needs on this machine."""
