/* The loops of a kernel driver over a scatterlist, for sg.rs to measure the list against: an entry of
 * 32 bytes with lengths of 32 bits, as the kernel's is on 64-bit machines with CONFIG_NEED_SG_DMA_LENGTH.
 */
#include <stdint.h>
#include <stdlib.h>

struct entry {
	uint64_t page_link;
	uint32_t offset;
	uint32_t length;
	uint64_t dma_address;
	uint32_t dma_length;
	uint32_t dma_flags;
};

_Static_assert(sizeof(struct entry) == 32, "as large as a scatterlist");

/* Merges pages into entries as long as their length allows; the table doubles as it grows. */
struct entry *bare_sg_build(const uint64_t *pages, uint64_t n, uint32_t page_size, uint64_t *count)
{
	struct entry *table = NULL;
	uint64_t used = 0, room = 0;

	for (uint64_t i = 0; i < n; i++) {
		if (used) {
			struct entry *last = &table[used - 1];

			if (last->dma_address + last->dma_length == pages[i] &&
			    last->dma_length <= UINT32_MAX - page_size) {
				last->length += page_size;
				last->dma_length += page_size;
				continue;
			}
		}
		if (used == room) {
			struct entry *larger;

			room = room ? room * 2 : 4;
			larger = realloc(table, room * sizeof(*table));
			if (!larger) {
				free(table);
				return NULL;
			}
			table = larger;
		}
		table[used++] = (struct entry){
			.length = page_size, .dma_address = pages[i], .dma_length = page_size,
		};
	}
	*count = used;
	return table;
}

void bare_sg_free(struct entry *table)
{
	free(table);
}

/* Puts the address of each block into a table of 512, over and over, as page tables are filled. Blocks go
 * on from one entry to the next; the first may begin inside one. */
uint64_t bare_sg_blocks(const struct entry *entry, uint64_t count, uint32_t shift, uint64_t *table)
{
	uint64_t advance = 0, blocks = 0, size = 1ull << shift;

	while (count) {
		uint64_t address = entry->dma_address + advance;
		uint64_t delta = size - (address & (size - 1));

		table[blocks++ % 512] = address & ~(size - 1);
		while (count && entry->dma_length - advance <= delta) {
			delta -= entry->dma_length - advance;
			advance = 0;
			entry++;
			count--;
		}
		advance += delta;
	}
	return blocks;
}

/* The offset at which each entry begins, for bare_sg_find. */
void bare_sg_starts(const struct entry *table, uint64_t count, uint64_t *starts)
{
	uint64_t at = 0;

	for (uint64_t i = 0; i < count; i++) {
		starts[i] = at;
		at += table[i].dma_length;
	}
}

/* The addresses of the bytes at these offsets, added up: a binary search for each, which the kernel's own
 * walk from the first entry on is no match for. */
uint64_t bare_sg_find(const struct entry *table, const uint64_t *starts, uint64_t count,
		      const uint64_t *offsets, uint64_t n)
{
	uint64_t sum = 0;

	for (uint64_t i = 0; i < n; i++) {
		const uint64_t *base = starts;

		for (uint64_t left = count; left > 1;) {
			uint64_t half = left / 2;

			base = base[half] <= offsets[i] ? base + half : base;
			left -= half;
		}
		sum += table[base - starts].dma_address + (offsets[i] - *base);
	}
	return sum;
}

/* The same, each offset depending on the address found before. */
uint64_t bare_sg_find_chain(const struct entry *table, const uint64_t *starts, uint64_t count,
			    const uint64_t *offsets, uint64_t n)
{
	uint64_t found = 0;

	for (uint64_t i = 0; i < n; i++) {
		uint64_t offset = offsets[i] ^ (found & 1);

		found = bare_sg_find(table, starts, count, &offset, 1);
	}
	return found;
}

/* The page size that fits, of those in the bitmap; 0 if none does. */
uint64_t bare_sg_best(const struct entry *entry, uint64_t count, uint64_t length, uint64_t bitmap, uint64_t iova)
{
	uint64_t changing = iova ^ (iova + length - 1);
	uint64_t base = ~0ull, size = 0, va = iova, mask = 0;
	unsigned int bits = 64 - __builtin_clzll(changing | 1);

	if (bits < 64)
		mask = bitmap & (~0ull << bits);
	for (uint64_t i = 0; i < count; i++, entry++) {
		if (base + size < base || base + size != entry->dma_address) {
			base = entry->dma_address;
			size = 0;
			mask |= base ^ va;
			if (i)
				mask |= va;
		}
		size += entry->dma_length;
		va += entry->dma_length;
	}
	if (mask)
		bitmap &= ~0ull >> (63 - __builtin_ctzll(mask));
	return bitmap ? 1ull << (63 - __builtin_clzll(bitmap)) : 0;
}
