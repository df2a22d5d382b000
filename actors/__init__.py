"""The place: in which process, with how much in flight? Ray lives here."""
