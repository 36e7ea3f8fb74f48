"""Sentences that name a person and a place and tell of no move of that person: a memory must leave them alone.

The templates of training, validation and test are others. {p} and {q} are two persons, {o} and {r} two places or
things, all drawn from those of a task; of [a|b|c] one is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from vllm_armt.babilong.wordings import chosen

if TYPE_CHECKING:
    from vllm_armt.babilong.stories import Split

TEMPLATES: dict[str, dict[Split, tuple[str, ...]]] = {
    "possession": {
        "train": (
            "{p}'s {o} is [larger|smaller|older|darker|warmer|nicer] than [the|my|our|{q}'s] {r}.",
            "The {o} [belongs|belonged] to {p}[| and {q}| alone| now].",
            "{p} [has|owns|keeps|bought|lost|found|drew|painted] [a picture|the plans|a photograph|the "
            "keys] of the {o}.",
            "{p} [owns|loves|paid for|inherited|designed|built|cleaned|painted|repaired] the {o}[| and the {r}].",
            "The [key|rent|floor|ceiling|carpet|lamp] of the {o} is {p}'s.",
            "{p} [bought|made|ordered|paid for] [new chairs|a lamp|a carpet|flowers|curtains] for the {o}.",
            "[It is|That was|This is] {p}'s {o}[| and not {q}'s].",
            "{p} [has|had] [no|a|another] {o}.",
        ),
        "validation": (
            "{p}'s favourite room is the {o}.",
            "The {o} was once the property of {p}.",
            "{p} rents the {o} from {q}.",
        ),
        "test": (
            "{p}'s {o} has two windows.",
            "The door of the {o} is {p}'s work.",
            "{p} possesses a map of the {o}.",
            "Half of the {o} is owned by {p}.",
        ),
    },
    "thought": {
        "train": (
            "{p} [thought|thinks|dreamt|dreams|spoke|speaks|sang|heard|knows] of the {o}[| again| with {q}].",
            "{p} [remembered|remembers|liked|likes|hated|loves|missed|described|imagined] the {o}[| well| very much].",
            "{p} [spoke|talked|asked|told {q}|read|sang|complained|joked] about the {o}[| all day| to {q}| yesterday].",
            "{p} likes the {o} [more than|less than|as much as] the {r}.",
            "{p} [was|is] [afraid|proud|ashamed|tired|sure] of the {o}.",
            "In {p}'s [dream|mind|story|letter|opinion] the {o} was [large|empty|red|beautiful].",
            "{p} [believes|said|knows|thinks] that the {o} is [cold|closed|empty|far away|very old].",
            "To {p} the {o} [seemed|looked|was] [small|strange|better than the {r}].",
            "{p} [counted|measured|studied|painted|praised|blamed] the {o}.",
            "{p} [listened|objected|sang a song|compared the {r}] to the {o}.",
            "{p} [looked|stared|pointed|smiled] [at|towards|into] the {o}.",
        ),
        "validation": (
            "{p} often thinks about the {o}.",
            "{p} could not forget the {o}.",
            "{p} told a story about the {o}.",
            "{p} admires the {o}.",
        ),
        "test": (
            "{p} wondered what the {o} looked like.",
            "{p} was fond of the {o}.",
            "{p} wrote about the {o}.",
            "The {o} reminded {p} of the {r}.",
        ),
    },
    "negation": {
        "train": (
            "{p} [did not|didn't|does not|will not|won't|cannot|could not|must not] "
            "[go to|move to|walk to|see|like|visit|enter|return to|find] the {o}[| today| again| with {q}].",
            "{p} [never|hardly ever|seldom] [went to|goes to|moved to|visited|saw|entered|comes to] the {o}.",
            "{p} [is|was] [not|never|not really] [in|near|at] the {o}[| with {q}].",
            "{p} has [never been|not been|not come|not moved|never gone] to the {o}.",
            "{p} [was not|has not been|is never] [seen|found|needed] in the {o}.",
            "{p} [refused|forgot|failed|declined] to [go to|come to|enter|clean] the {o}.",
            "It is [not true|false|a lie] that {p} [went to|moved to|is in] the {o}.",
            "[Neither|Not even] {p} [nor {q} went to|moved to|came to] the {o}.",
            "[No one|Nobody] [saw|met|found|followed] {p} in the {o}.",
            "{p} [left|leaves|had left] without [seeing|entering|looking into] the {o}.",
        ),
        "validation": (
            "{p} would not go to the {o}.",
            "Nobody has seen {p} in the {o}.",
            "{p} isn't in the {o}.",
            "{p} did not even look into the {o}.",
        ),
        "test": (
            "{p} did not travel to the {o}.",
            "{p} has not gone to the {o}.",
            "{p} avoided the {o}.",
            "{p} wasn't in the {o}.",
        ),
    },
    "wish": {
        "train": (
            "{p} [would like|wants|wanted|hopes|hoped|needs|plans|intends|promised|tried|asked] "
            "to [go to|move to|see|visit|return to|stay in|be in|walk to] the {o}[| soon| one day| with {q}].",
            "{p} [might|may|will|would|should|must|can] [go to|move to|visit|see|return to|clean] the {o}"
            "[| tomorrow| next week| some day| later].",
            "[If|When|Unless|In case] {p} [went to|moves to|comes to|goes to|is in] the {o}, [it will "
            "rain|call {q}|be careful].",
            "[Should|Will|Would|Could|Can] {p} [go to|move to|be in|like|see] the {o}?",
            "{p} should have [gone to|moved to|cleaned|seen] the {o}.",
            "Let {p} [go to|see|clean|have] the {o}.",
            "{p}, [please go to|come to|do not enter|look at] the {o}!",
            "{p} [is about|is not ready|is too tired|was ready] to [go to|enter|leave for] the {o}.",
            "{p} [was on the way to|is looking for|was waiting for|asked the way to] the {o}.",
        ),
        "validation": (
            "{p} wished to be in the {o}.",
            "{p} may travel to the {o} next year.",
            "{p} dreams of going to the {o}.",
            "Perhaps {p} will come to the {o}.",
        ),
        "test": (
            "{p} longed for the {o}.",
            "{p} is going to paint the {o}.",
            "If only {p} were in the {o}.",
            "{p} could go to the {o}.",
        ),
    },
    "report": {
        "train": (
            "{q} [asked|wondered|wanted to know|did not know] [whether|if] {p} [was in|is in|went to|moved "
            "to] the {o}.",
            "{q} [told|asked|wrote to|spoke to|warned|called] {p} about the {o}.",
            "{q} [asked|told|ordered|begged|helped|wanted] {p} to [clean|paint|leave|avoid|go to|close] the {o}.",
            '"[Is|Was] {p} in the {o}?" [asked {q}|said {q}|they asked].',
            "{p} [heard|saw|smelled] [a noise|smoke|music|voices|something] from the {o}.",
            "{p} was [told|warned|informed|sure] that the {o} is [cold|closed|on fire|empty].",
            "{q} [wrongly|falsely|never really] [believed|said|thought] that {p} [was in|went to] the {o}.",
            "{q} [waited for|looked for|missed|expected|called] {p} in the {o}.",
            "{q} [sent|gave|showed|promised] {p} [a picture|the keys|a plan] of the {o}.",
            "[Some|They|People] say that {p} [likes|owns|fears|will buy] the {o}.",
        ),
        "validation": (
            "{q} wants to know if {p} went to the {o}.",
            "{p} heard that the {o} is closed.",
            "{q} invited {p} to the {o}.",
        ),
        "test": (
            "{q} doubted that {p} was in the {o}.",
            "{p} was asked about the {o}.",
            "{q} looked for {p} in the {o} in vain.",
            "{q} warned {p} of the {o}.",
        ),
    },
    "somebody else": {
        "train": (
            "{p}'s [brother|mother|dog|uncle|friend|son|wife|boss|aunt|horse|doctor|daughter] "
            "[went to|moved to|is in|ran to|walked to|came to|journeyed to|travelled to|went back to] the {o}.",
            "[The friend|The sister|A friend|The son|The dog|The parents|A servant] of {p} "
            "[went to|moved to|travelled to|is in|went back to|journeyed to|came to] the {o}.",
            "[A man|Somebody|A woman|A child|The doctor] who [knew|loved|looked like|worked for|met|saw] {p} "
            "[went to|moved to|is in|ran to] the {o}.",
            "[Somebody|A stranger|They all|The guests|We] [asked for|left|waved to|thanked|forgot] {p} and "
            "[went to|moved to] the {o}.",
            "[Without|Because of|Instead of|Thanks to|After a word with] {p} [they|we|the guests|the boys] "
            "[went to|moved to] the {o}.",
            "[My|Our|Your|His] friend, not {p}, [went to|moved to|is in] the {o}.",
            "{p}'s [letter|horse|luggage|train|parcel] [went to|was brought to|came to|has reached] the {o}.",
        ),
        "validation": (
            "{p}'s neighbour went to the {o}.",
            "The cousin of {p} is in the {o}.",
            "A girl whom {p} knows moved to the {o}.",
        ),
        "test": (
            "{p}'s father moved to the {o}.",
            "The cat of {p} ran to the {o}.",
            "{p}'s teacher is in the {o}.",
            "Someone like {p} went to the {o}.",
        ),
    },
    "thing": {
        "train": (
            "A [letter|cake|present|message|chair|ticket] for {p} [lay|lies|is|was left|stood|waits] in the {o}.",
            "The [book|letter|song|list] that {p} [wrote|lost|bought|read] [is|was|lies|was found] in the {o}.",
            "There [is|was] a [letter|picture|message|present|call] [from|for|of] {p} in the {o}.",
            "A [picture|portrait|photograph|statue] of {p} [hangs|stands|was|is] in the {o}.",
            "{p}'s [coat|bag|book|umbrella|watch|letter|car] [was left|is|lies|was found|was lost|was seen] "
            "in the {o}.",
            "[Somebody|They|We|I] [called for|asked for|spoke of|drank to|laughed about] {p} in the {o}.",
            "The [coat|glasses|voice|bag|work] of {p} [lies|was heard|was|can be found] in the {o}.",
            "{p}'s [bicycle|car|house|tree] stands [near|behind|beside] the {o}.",
        ),
        "validation": (
            "A parcel for {p} came to the {o}.",
            "{p}'s hat was found in the {o}.",
            "In the {o} there is a chair for {p}.",
        ),
        "test": (
            "A note for {p} lies in the {o}.",
            "{p}'s shoes are in the {o}.",
            "The name of {p} is written on the wall of the {o}.",
            "The {o} smells of {p}'s coffee.",
        ),
    },
}
"""By their kind."""

KINDS = tuple(TEMPLATES)


def distractor(
    split: Split,
    random: Random,
    persons: Sequence[str],
    places: Sequence[str],
    kinds: Sequence[str] = KINDS,
    about: str | None = None,
) -> str:
    """A sentence of one of the kinds, in the words of a part, about one or two of the persons and of the places.

    `about` is the first person, if it must be that one.
    """
    template = random.choice(TEMPLATES[random.choice(kinds)][split])
    words = chosen(template, random)
    (p, q), (o, r) = random.sample(persons, 2), random.sample(places, 2)
    if about is not None:
        p, q = about, next(person for person in persons if person != about)
    return words.format(p=p, q=q, o=o, r=r)
