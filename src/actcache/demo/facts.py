"""What the demo model knows: a table of simple facts, each a subject with exactly one value per relation.

Every relation has several subjects per value, so that a value can only be found by looking its subject up, and so that
for each true statement there is a false one that uses a value of the same kind.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LANDMARKS", "RELATIONS", "Fact", "facts", "values"]

# City -> its landmarks, with the article a sentence needs. No landmark's name contains its city.
LANDMARKS: dict[str, tuple[str, ...]] = {
    "Paris": ("the Eiffel Tower", "the Louvre", "the Arc de Triomphe", "the Pompidou Centre"),
    "London": ("Big Ben", "Tower Bridge", "Buckingham Palace", "Westminster Abbey", "the British Museum"),
    "Rome": ("the Colosseum", "the Pantheon", "the Trevi Fountain", "the Spanish Steps"),
    "Berlin": ("the Brandenburg Gate", "the Reichstag", "the Pergamon Museum"),
    "Madrid": ("the Prado Museum", "Retiro Park", "Almudena Cathedral"),
    "Barcelona": ("the Sagrada Familia", "Park Guell", "Casa Batllo"),
    "Athens": ("the Parthenon", "the Acropolis"),
    "Istanbul": ("the Hagia Sophia", "the Blue Mosque", "Topkapi Palace", "the Galata Tower"),
    "Cairo": ("Tahrir Square", "the Al-Azhar Mosque"),
    "Moscow": ("the Kremlin", "Red Square", "the Bolshoi Theatre"),
    "Beijing": ("the Forbidden City", "the Temple of Heaven", "the Summer Palace"),
    "Shanghai": ("the Bund", "the Oriental Pearl Tower"),
    "Tokyo": ("the Skytree", "Shibuya Crossing", "the Meiji Shrine"),
    "Kyoto": ("the Golden Pavilion", "the Fushimi Inari Shrine"),
    "Sydney": ("Bondi Beach", "Taronga Zoo"),
    "Prague": ("Charles Bridge", "the Dancing House"),
    "Vienna": ("Schonbrunn Palace", "Belvedere Palace", "the Hofburg"),
    "Amsterdam": ("the Rijksmuseum", "the Van Gogh Museum"),
    "Brussels": ("the Atomium", "the Manneken Pis"),
    "Copenhagen": ("the Little Mermaid", "the Tivoli Gardens"),
    "Lisbon": ("Belem Tower", "the Jeronimos Monastery"),
    "Budapest": ("the Chain Bridge", "the Gellert Baths"),
    "Seattle": ("the Space Needle", "Pike Place Market"),
    "Chicago": ("Willis Tower", "Cloud Gate", "Navy Pier"),
    "Toronto": ("the CN Tower", "Casa Loma"),
    "Florence": ("the Uffizi Gallery", "the Ponte Vecchio"),
    "Venice": ("the Rialto Bridge", "the Bridge of Sighs"),
    "Delhi": ("the Red Fort", "Qutub Minar", "the Lotus Temple"),
}

_CITIES: dict[str, tuple[str, ...]] = {
    "France": ("Paris", "Lyon"),
    "England": ("London", "Manchester"),
    "Italy": ("Rome", "Florence", "Venice", "Milan"),
    "Germany": ("Berlin", "Munich", "Hamburg"),
    "Spain": ("Madrid", "Barcelona", "Seville"),
    "Greece": ("Athens", "Sparta"),
    "Turkey": ("Istanbul", "Ankara"),
    "Egypt": ("Cairo", "Alexandria"),
    "Russia": ("Moscow", "Kazan"),
    "China": ("Beijing", "Shanghai"),
    "Japan": ("Tokyo", "Kyoto", "Osaka"),
    "Australia": ("Sydney", "Melbourne"),
    "Czechia": ("Prague", "Brno"),
    "Austria": ("Vienna", "Salzburg"),
    "Holland": ("Amsterdam", "Rotterdam"),
    "Belgium": ("Brussels", "Antwerp"),
    "Denmark": ("Copenhagen", "Aarhus"),
    "Portugal": ("Lisbon", "Porto"),
    "Hungary": ("Budapest", "Debrecen"),
    "America": ("Seattle", "Chicago", "Boston"),
    "Canada": ("Toronto", "Montreal"),
    "India": ("Delhi", "Mumbai"),
}

# Animal -> class, habitat, colour.
_ANIMALS: dict[str, tuple[str, str, str]] = {
    "lion": ("mammal", "savannah", "yellow"),
    "elephant": ("mammal", "savannah", "grey"),
    "rhino": ("mammal", "savannah", "grey"),
    "buffalo": ("mammal", "savannah", "black"),
    "ostrich": ("bird", "savannah", "black"),
    "vulture": ("bird", "savannah", "brown"),
    "termite": ("insect", "savannah", "white"),
    "camel": ("mammal", "desert", "brown"),
    "scarab": ("insect", "desert", "black"),
    "locust": ("insect", "desert", "yellow"),
    "rattlesnake": ("reptile", "desert", "brown"),
    "gecko": ("reptile", "desert", "yellow"),
    "roadrunner": ("bird", "desert", "brown"),
    "meerkat": ("mammal", "desert", "brown"),
    "whale": ("mammal", "ocean", "blue"),
    "dolphin": ("mammal", "ocean", "grey"),
    "shark": ("fish", "ocean", "grey"),
    "tuna": ("fish", "ocean", "blue"),
    "clownfish": ("fish", "ocean", "orange"),
    "seahorse": ("fish", "ocean", "orange"),
    "albatross": ("bird", "ocean", "white"),
    "turtle": ("reptile", "ocean", "green"),
    "penguin": ("bird", "ocean", "black"),
    "trout": ("fish", "river", "green"),
    "salmon": ("fish", "river", "red"),
    "piranha": ("fish", "river", "red"),
    "pike": ("fish", "river", "green"),
    "crocodile": ("reptile", "river", "green"),
    "otter": ("mammal", "river", "brown"),
    "kingfisher": ("bird", "river", "blue"),
    "swan": ("bird", "river", "white"),
    "dragonfly": ("insect", "river", "blue"),
    "fox": ("mammal", "forest", "red"),
    "tiger": ("mammal", "forest", "orange"),
    "gorilla": ("mammal", "forest", "black"),
    "parrot": ("bird", "forest", "green"),
    "woodpecker": ("bird", "forest", "red"),
    "ladybird": ("insect", "forest", "red"),
    "butterfly": ("insect", "forest", "orange"),
    "iguana": ("reptile", "forest", "green"),
}

_COLOURS: dict[str, tuple[str, ...]] = {
    "green": ("grass", "spinach", "a cucumber", "an emerald", "parsley"),
    "white": ("snow", "milk", "chalk", "salt", "flour"),
    "black": ("coal", "tar", "ink", "liquorice"),
    "red": ("blood", "a tomato", "a ruby", "ketchup", "a strawberry"),
    "yellow": ("a banana", "a lemon", "butter", "mustard", "a sunflower"),
    "blue": ("the sky", "a sapphire", "a cornflower", "denim"),
    "orange": ("a carrot", "a pumpkin", "a tangerine", "amber"),
    "brown": ("chocolate", "coffee", "cinnamon", "a chestnut"),
    "grey": ("lead", "ash", "concrete", "slate"),
}

RELATIONS: tuple[str, ...] = (
    "landmark-city",
    "city-country",
    "animal-class",
    "animal-habitat",
    "animal-colour",
    "thing-colour",
)


@dataclass(frozen=True, order=True)
class Fact:
    """One entry of the table: ``value`` is the only true one for ``subject`` under ``relation``."""

    relation: str
    subject: str
    value: str


def _table() -> dict[str, tuple[Fact, ...]]:
    pairs: dict[str, list[tuple[str, str]]] = {
        "landmark-city": [(name, city) for city, names in LANDMARKS.items() for name in names],
        "city-country": [(city, country) for country, cities in _CITIES.items() for city in cities],
        "thing-colour": [(thing, colour) for colour, things in _COLOURS.items() for thing in things],
    }
    for column, relation in enumerate(("animal-class", "animal-habitat", "animal-colour")):
        pairs[relation] = [(animal, row[column]) for animal, row in _ANIMALS.items()]
    return {relation: tuple(Fact(relation, s, v) for s, v in pairs[relation]) for relation in RELATIONS}


_FACTS = _table()


def facts(relation: str | None = None) -> list[Fact]:
    """All facts of one relation (one of ``RELATIONS``), or of all of them, in a fixed order."""
    if relation is None:
        return [fact for name in RELATIONS for fact in _FACTS[name]]
    return list(_FACTS[relation])


def values(relation: str) -> list[str]:
    """The different values of a relation, in the order of their first fact."""
    return list(dict.fromkeys(fact.value for fact in _FACTS[relation]))
