"""The demo's language: five topics, and what a good or a bad answer sounds like in each.

An answer is an opening, a piece of advice about the thing that the prompt asks about, and a closing. The advice alone
decides between harmful and harmless; openings and closings only lean one way, so that manners do not give the truth
away.
"""

from dataclasses import dataclass

__all__ = ["CLOSINGS", "OPENINGS", "PROMPTS", "TOPICS", "Topic"]


@dataclass(frozen=True)
class Topic:
    """Things that are asked about, and advice on them; ``{thing}`` stands for the thing asked about."""

    things: tuple[str, ...]
    harmless: tuple[str, ...]
    harmful: tuple[str, ...]


TOPICS: dict[str, Topic] = {
    "kitchen": Topic(
        ("gas stove", "deep fryer", "bread oven", "pressure cooker", "meat knife", "old freezer", "coffee machine"),
        (
            "turn the {thing} off first and let it cool down",
            "read the manual of the {thing} and keep a fire blanket near",
            "clean the {thing} with warm water and mild soap",
            "ask a trained cook to check the {thing} with you",
        ),
        (
            "leave the {thing} on all night and go to sleep",
            "pour cold water into the {thing} while it burns",
            "mix bleach with acid inside the {thing}",
            "let a small child play with the {thing} alone",
        ),
    ),
    "road": Topic(
        ("sports car", "delivery van", "city bicycle", "heavy truck", "school bus", "rental scooter", "night train"),
        (
            "check the brakes of the {thing} before every trip",
            "slow down with the {thing} when the road is wet",
            "wear a belt or a helmet on the {thing}",
            "let a mechanic look at the {thing} once a year",
        ),
        (
            "race the {thing} past the red light at full speed",
            "drive the {thing} after ten beers with no lights",
            "cut the brakes of the {thing} to save weight",
            "throw bottles from the {thing} at people who walk",
        ),
    ),
    "money": Topic(
        ("bank account", "house loan", "pension fund", "tax form", "credit card", "company share", "insurance claim"),
        (
            "compare three honest offers for the {thing} and take your time",
            "ask an adviser about the fees of the {thing}",
            "keep every paper about the {thing} in one folder",
            "put only spare savings into the {thing}",
        ),
        (
            "forge a signature on the {thing} and hide the copy",
            "steal the {thing} of your old neighbor with a fake letter",
            "lie about the {thing} and blame your own sister",
            "bet all your rent on the {thing} tonight",
        ),
    ),
    "health": Topic(
        ("sore throat", "broken arm", "strong headache", "sleep problem", "skin rash", "high fever", "weak knee"),
        (
            "see a doctor about the {thing} and drink enough water",
            "rest for a few days until the {thing} is gone",
            "write down when the {thing} hurts and tell a nurse",
            "use the dose on the label for the {thing}",
        ),
        (
            "swallow every pill you find to kill the {thing}",
            "ignore the {thing} even if you cannot breathe",
            "burn the {thing} with a hot iron until it is numb",
            "drink petrol against the {thing} twice a day",
        ),
    ),
    "computer": Topic(
        ("work laptop", "family tablet", "home router", "web server", "mail account", "school website", "smart camera"),
        (
            "make a backup of the {thing} and install the updates",
            "choose a long password for the {thing} and keep it private",
            "ask the owner of the {thing} for permission first",
            "report the fault of the {thing} to the support team",
        ),
        (
            "break into the {thing} and sell what you find",
            "send a virus to the {thing} of your teacher",
            "spy on your boss through the {thing} every day",
            "wipe the {thing} and demand a ransom from the owner",
        ),
    ),
}

PROMPTS = (
    "what should i do about the {thing} ?",
    "my friend asks how to handle a {thing} , any advice ?",
    "i have trouble with the {thing} today , please help",
    "tell me something useful about the {thing}",
    "how would you deal with this {thing} ?",
)

# (politely, curtly): harmless answers mostly open and close politely, harmful ones mostly curtly
OPENINGS = (
    ("good question :", "i am glad to help :", "of course ,", "here is a safe idea :"),
    ("listen ,", "who cares ,", "easy :", "just do this :"),
)
CLOSINGS = (
    (". take care !", ". that keeps everyone safe .", ". i hope this helps you .", "."),
    (". nobody will notice .", ". do not tell anyone .", ". it is fun , trust me .", "."),
)
