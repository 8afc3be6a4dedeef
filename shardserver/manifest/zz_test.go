package manifest
import ("testing";"time";"strings";"fmt")
func TestScratch(t *testing.T){
 bomb:="a: &a [x,x,x,x,x,x,x,x,x]\n"
 prev:="a"
 for _,c:=range strings.Split("bcdefghi","") { bomb+=c+": &"+c+" ["+strings.TrimSuffix(strings.Repeat("*"+prev+",",9),",")+"]\n"; prev=c }
 for n,d:=range map[string]string{
 "bomb":bomb,
 "deep":strings.Repeat("[",1<<20),
 "deep2":"a: "+strings.Repeat("{a: ",9000)+strings.Repeat("}",9000),
 "deepobj":guild("a","x: "+strings.Repeat("{a: ",9000)+strings.Repeat("}",9000)),
 "q1":guild("a","")+shard("s","storage: {size: 1e999999999}"),
 "q2":guild("a","")+shard("s","storage: {size: \"1e-999999999\"}"),
 "q2i":guild("a","")+shard("s","storage: {size: 1073741824}"),
 "q3":guild("a","")+shard("s","storage: {size: '"+strings.Repeat("9",1000000)+"'}"),
 "chan":guild("a","bootstrap: {channels: ["+strings.Repeat("{name: a, type: Text},",150000)+"]}"),
 "docs":strings.Repeat("---\n{}\n",500000),
 "g10000":guilds(10000)+shard("s","capacity: {guilds: 10000}"),
 "dupkey":guild("a", strings.Repeat("x: 1,",500000)),
 } {
 s:=time.Now(); m,err:=Parse([]byte(d)); e:=fmt.Sprint(err); fmt.Println("-----",n,time.Since(s),m!=nil,len(e), e[:min(len(e),300)]) }
}
