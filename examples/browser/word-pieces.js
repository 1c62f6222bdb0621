// Sentences as the ids that BERT (uncased) reads: words are lower-cased and cut into pieces.

const LONGEST = 64; // ids in a sentence, with the two that begin and end it
const PUNCTUATION = /[!-/:-@[-`{-~]|\p{P}/u;

/** A tokenizer for a `vocab.txt` with a piece on each line. */
export function openVocabulary(text) {
  const ids = new Map(text.split("\n").map((piece, id) => [piece.trimEnd(), id]));
  const id = (piece) => ids.get(piece);
  return (sentence) => {
    const found = [];
    for (const word of words(sentence)) found.push(...pieces(word, ids));
    return [id("[CLS]"), ...found.slice(0, LONGEST - 2), id("[SEP]")];
  };
}

function words(sentence) {
  const plain = sentence.toLowerCase().normalize("NFD").replace(/\p{Mn}/gu, "");
  return plain.replace(new RegExp(PUNCTUATION, "gu"), " $& ").split(/\s+/u).filter(Boolean);
}

/** The longest pieces from the left; a word with a part that is no piece is unknown. */
function pieces(word, ids) {
  const found = [];
  for (let start = 0; start < word.length; ) {
    let end = word.length;
    const piece = () => (start ? "##" : "") + word.slice(start, end);
    while (end > start && !ids.has(piece())) end -= 1;
    if (end === start) return [ids.get("[UNK]")];
    found.push(ids.get(piece()));
    start = end;
  }
  return found;
}
