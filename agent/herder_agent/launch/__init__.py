"""How children are made and spoken to, behind one `Child`: fork server, fresh interpreters, commands."""
