"""What client, coordinator, agent and launcher share: identities, states, errors, limits, configuration, the wire."""
