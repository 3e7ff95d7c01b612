"""Programs that several test files run."""

from program import Module, Prediction, Program


class Two(Program):
    """The second call is asked with what the first one answered."""

    def __init__(self):
        self.ask = Module("x -> y", "Ask.")
        self.note = Module("x, y -> z", "Note.")

    async def forward(self, x):
        y = (await self.ask(x=x)).y
        return Prediction(z=(await self.note(x=x, y=y)).z)


class Loose(Two):
    """Whatever a random LM says will do."""

    async def forward(self, x):
        for module, inputs in ((self.ask, {"x": x}), (self.note, {"x": x, "y": ""})):
            try:
                await module(**inputs)
            except ValueError:
                pass
        return Prediction(x=x)
