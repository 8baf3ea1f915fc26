// A C++ program with RAII around the handles.
#include "dmabuf_rdma.h"

#include <array>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <vector>

namespace
{

void check(drdma_status status)
{
	if (status == DRDMA_OK)
		return;
	std::vector<char> why(drdma_last_message(nullptr, 0) + 1);
	drdma_last_message(why.data(), why.size());
	throw std::runtime_error(why.data());
}

struct Release {
	void operator()(drdma_domain *domain) const { drdma_domain_unref(domain); }
	void operator()(drdma_region *region) const { drdma_region_unref(region); }
	void operator()(drdma_remote *remote) const { drdma_remote_unref(remote); }
	void operator()(drdma_connection *connection) const { drdma_connection_unref(connection); }
	void operator()(drdma_transfer *transfer) const { drdma_transfer_unref(transfer); }
};

template <typename T> using Handle = std::unique_ptr<T, Release>;

template <typename T, typename Make> Handle<T> make(Make call)
{
	T *handle = nullptr;
	check(call(&handle));
	return Handle<T>(handle);
}

int run()
{
	auto domain = make<drdma_domain>([](auto **place) { return drdma_domain_open("rxe0", place); });
	drdma_options options{};
	auto connection = make<drdma_connection>(
		[&](auto **place) { return drdma_connection_new(domain.get(), &options, place); });
	std::array<unsigned char, DRDMA_ENDPOINT_BYTES> endpoint;
	check(drdma_connection_endpoint(connection.get(), endpoint.data()));
	check(drdma_connection_connect(connection.get(), endpoint.data()));

	std::vector<char> source(1000, 'x'), target(1000);
	auto local = [&](std::vector<char> &memory) {
		return make<drdma_region>([&](auto **place) {
			return drdma_register_host(domain.get(), memory.data(), memory.size(), DRDMA_REMOTE, nullptr,
						   nullptr, place);
		});
	};
	auto from = local(source), to = local(target);
	std::array<unsigned char, 52> description;
	std::size_t size = description.size();
	check(drdma_region_describe(to.get(), description.data(), &size));
	auto remote = make<drdma_remote>(
		[&](auto **place) { return drdma_remote_parse(description.data(), size, place); });
	auto transfer = make<drdma_transfer>([&](auto **place) {
		return drdma_write(connection.get(), from.get(), remote.get(), 30000, place);
	});
	check(drdma_transfer_wait(transfer.get(), -1, nullptr));
	try {
		check(drdma_remote_parse(source.data(), source.size(), nullptr));
		return 1;
	} catch (const std::runtime_error &error) {
		std::puts(error.what());
	}
	return source == target ? 0 : 1;
}

} // namespace

int main()
{
	const int code = run();
	return drdma_live_handles() == 0 ? code : 2;
}
