"""Who follows the devices, made of a list: what a source over made-up records is told of them."""

from collections import deque

HOST_NETNS = 4026531840


class MadeFollower:
    """A `FollowsDevices` that gives one of `polls` at each call, then no news."""

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
