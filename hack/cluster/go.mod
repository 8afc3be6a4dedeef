module guildhall.dev/guildhall/hack/cluster

go 1.26.0
