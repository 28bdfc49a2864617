"""Prompts for a fit to which no inputs are given. They were written for this project.

They differ in subject, style, length, light, distance and number of objects. Neighbours differ most, so that the first
few are as varied as all of them.
"""

PICTURES = (
    "a red fox asleep on a stone wall",
    "An old fisherman mends a net on a pier at dawn, with grey light on the water and gulls behind him.",
    "flat vector illustration of a bicycle leaning against a yellow kiosk",
    'A bakery window at night with a neon sign that reads "OPEN LATE".',
    "Macro photograph of frost on a blade of grass.",
    "A wide valley in autumn, seen from a ridge: a river with three bends, patches of orange forest, low clouds over "
    "the far mountains, and one small farm with a smoking chimney in the left half of the picture.",
    "two children build a cardboard rocket in a garage",
    "oil painting of a copper kettle, two lemons and a blue cloth",
    "Night street in the rain, seen through the windscreen of a taxi.",
    "portrait of a woman with freckles and short silver hair, soft window light",
    "a bowl of ramen with a soft egg, from above",
    'A chalkboard in a small cafe. It says "soup of the day: tomato" in neat white letters.',
    "Isometric drawing of a tiny library with a spiral staircase and a cat on every floor.",
    "a lighthouse in a storm",
    "Black and white photograph of a jazz trio on a small stage: a double bass, drums, and a laughing pianist.",
    "the surface of an imaginary moon with violet sand and two suns, wide shot",
    "A glass workshop. A man in a leather apron turns a glowing vase at the end of a long pipe.",
    "a pile of knitted socks in many colours",
    "Watercolour of a market square with striped awnings, pigeons and a fountain, painted with loose strokes on rough "
    "paper.",
    "close-up of the eye of a chameleon",
    "An astronaut waters tomatoes in a greenhouse on a space station.",
    "minimalist poster of a single white sail on a dark blue sea",
    "A crowded train platform in winter. People wear thick coats, their breath is visible, and the clock above them "
    "shows ten past seven.",
    "a tortoiseshell cat with a paper crown",
    "Architectural photograph of a concrete staircase with hard shadows at noon.",
    "pixel art of a dragon that guards a pile of books",
    "A hand holds a sprouting bean over dark soil.",
    "a desert road that runs straight to the horizon, one telephone pole, no clouds",
    "Ink drawing of a heron among reeds, with a large empty space on the right.",
    "A football team of robots celebrates a goal in a full stadium under floodlights, confetti in the air.",
    "wooden chess pieces on a marble board, shallow depth of field",
    'A hiking sign in a forest with two arrows: "LAKE 2 km" and "HUT 5 km".',
    "an elderly couple dances in a kitchen",
    "Underwater view of a coral reef with a school of yellow fish, rays of sunlight from above, and a diver far away.",
    "clay model of a snail that carries a small house with lit windows",
    "A snow-covered village at blue hour, with warm light in every window and a single set of footprints.",
    "product photo of a green fountain pen on white paper",
    "A medieval blacksmith and her apprentice, sparks between them, dark background, dramatic light from the forge.",
    "aerial view of tulip fields in straight stripes",
    "A steam train crosses a long stone bridge in the fog, while sheep graze below.",
)
"""For pictures."""

CLIPS = (
    "A dog runs along a beach and shakes the water off its fur.",
    "Slow pan over a mountain lake in the morning. Mist drifts over the water, and a boat moves away from the camera.",
    "hands shape a bowl on a spinning potter's wheel, close-up",
    "Traffic at a large crossing at night, seen from above, with red and white lights that flow in both directions.",
    "a paper plane glides through an empty classroom",
    "A woman in a yellow raincoat walks towards the camera on a wet street and opens her umbrella.",
    "timelapse of a sunflower that opens",
    "The camera flies low over a pine forest, passes a waterfall, and turns towards the setting sun.",
    "a candle flame flickers in the wind and goes out",
    "An animated fox made of felt hops over three stones in a stream.",
    "A cook tosses vegetables in a wok, flames rise for a moment, and steam fills the small kitchen.",
    "waves break on black rocks, slow motion",
    "A train leaves a station. A boy on the platform waves until the last carriage is out of view.",
    "ink drops spread in a glass of clear water",
    "A skateboarder rolls down a ramp, jumps, turns once in the air and lands.",
    "A grandfather clock in a dark hall; only its pendulum moves.",
    "Snow falls on a city park while two people push a sledge up a hill.",
    "a hummingbird hovers in front of a red flower",
    "A drone shot rises from a crowded market until the whole old town and its harbour can be seen.",
    "a robot arm stacks coloured cubes, one after the other",
)
"""For videos; each says what moves."""
