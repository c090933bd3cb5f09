"""The coordinator: accepts jobs, journals them, schedules them on agents."""
