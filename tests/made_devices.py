"""A follower of devices that returns devices from a list, for sources over made-up records."""

from collections import deque

HOST_NETNS = 4026531840


class MadeFollower:
    """A `FollowsDevices` whose `poll` returns the next element of `polls` at each call, and None after the last."""

    def __init__(self, *polls):
        self.host_netns = HOST_NETNS
        self.on_host_network = ()
        self.polls = deque(polls)
        self.on_news = lambda: None
        self.state = "new"

    async def open(self):
        self.state = "open"

    def poll(self):
        return self.polls.popleft() if self.polls else None

    async def aclose(self):
        self.state = "closed"
