"""The doors: who asks, and from where?"""
